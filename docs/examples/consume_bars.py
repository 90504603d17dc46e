"""Print final bars from topic ``bars.rows``: plain Avro records, one a bar, readable with any Avro library.

python docs/examples/consume_bars.py [BOOTSTRAP] [REGISTRY_URL] [COUNT]
"""

import io
import json
import sys
import urllib.request

import fastavro
from confluent_kafka import Consumer

bootstrap = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:19092"
registry = sys.argv[2] if len(sys.argv) > 2 else "http://127.0.0.1:19081"
count = int(sys.argv[3]) if len(sys.argv) > 3 else 10

consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "example", "auto.offset.reset": "earliest"})
consumer.subscribe(["bars.rows"])
schemas = {}
while count > 0:
    message = consumer.poll(10)
    if message is None:
        sys.exit("no bars within 10 s: is the stack up and a source running?")
    if message.error():
        continue
    value = message.value()
    schema_id = int.from_bytes(value[1:5], "big")  # Confluent wire format: 0x00, 4-byte schema id, Avro
    if schema_id not in schemas:
        with urllib.request.urlopen(f"{registry}/schemas/ids/{schema_id}") as answer:
            schemas[schema_id] = fastavro.parse_schema(json.loads(json.load(answer)["schema"]))
    bar = fastavro.schemaless_reader(io.BytesIO(value[5:]), schemas[schema_id], None)
    print(
        bar["exchange"],
        bar["symbol"],
        bar["timeframe"],
        bar["open_time_us"],
        bar["open"],
        bar["high"],
        bar["low"],
        bar["close"],
        bar["volume"],
    )
    count -= 1
consumer.close()
