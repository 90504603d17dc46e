"""Read topic ``trades`` at full speed: a frame is one Avro record whose ``bytes`` fields are little-endian arrays.

python docs/examples/consume_trades.py [BOOTSTRAP] [REGISTRY_URL] [FRAMES]
"""

import io
import json
import sys
import urllib.request

import fastavro
import numpy as np
from confluent_kafka import Consumer

bootstrap = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:19092"
registry = sys.argv[2] if len(sys.argv) > 2 else "http://127.0.0.1:19081"
frames = int(sys.argv[3]) if len(sys.argv) > 3 else 10

consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "example", "auto.offset.reset": "earliest"})
consumer.subscribe(["trades"])
with urllib.request.urlopen(f"{registry}/subjects/trades-value/versions/latest") as answer:
    schema = fastavro.parse_schema(json.loads(json.load(answer)["schema"]))
while frames > 0:
    message = consumer.poll(10)
    if message is None:
        sys.exit("no trades within 10 s: is the stack up and a source running?")
    if message.error():
        continue
    frame = fastavro.schemaless_reader(io.BytesIO(message.value()[5:]), schema, None)
    price = np.frombuffer(frame["price"], "<f8")  # three lines turn a column into an array
    symbol_code = np.frombuffer(frame["symbol_code"], "<i4")
    trade_id = np.frombuffer(frame["trade_id"], "<i8")
    for code in np.unique(symbol_code):
        rows = symbol_code == code
        print(frame["symbols"][code], rows.sum(), "trades, ids", trade_id[rows].min(), "..", trade_id[rows].max(), "last", price[rows][-1])
    frames -= 1
consumer.close()
