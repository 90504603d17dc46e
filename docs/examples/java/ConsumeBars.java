import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.nio.ByteBuffer;
import java.time.Duration;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Properties;
import org.apache.avro.Schema;
import org.apache.avro.generic.GenericDatumReader;
import org.apache.avro.generic.GenericRecord;
import org.apache.avro.io.DecoderFactory;
import org.apache.kafka.clients.consumer.ConsumerRecord;
import org.apache.kafka.clients.consumer.KafkaConsumer;
import org.apache.kafka.common.serialization.ByteArrayDeserializer;
import org.apache.kafka.common.serialization.StringDeserializer;

/** Prints final bars from topic bars.rows. Arguments: [bootstrap] [registry] [count]. */
public final class ConsumeBars {
    private static final int HEADER_BYTES = 5; // Confluent wire format: 0x00, 4-byte schema id, Avro

    public static void main(String[] args) throws Exception {
        String bootstrap = args.length > 0 ? args[0] : "127.0.0.1:19092";
        String registry = args.length > 1 ? args[1] : "http://127.0.0.1:19081";
        int count = args.length > 2 ? Integer.parseInt(args[2]) : 10;
        Properties settings = new Properties();
        settings.put("bootstrap.servers", bootstrap);
        settings.put("group.id", "example-java");
        settings.put("auto.offset.reset", "earliest");
        Map<Integer, Schema> schemas = new HashMap<>();
        try (KafkaConsumer<String, byte[]> consumer =
                new KafkaConsumer<>(settings, new StringDeserializer(), new ByteArrayDeserializer())) {
            consumer.subscribe(List.of("bars.rows"));
            long deadline = System.nanoTime() + Duration.ofSeconds(30).toNanos();
            while (count > 0 && System.nanoTime() < deadline) {
                for (ConsumerRecord<String, byte[]> record : consumer.poll(Duration.ofSeconds(1))) {
                    byte[] value = record.value();
                    int id = ByteBuffer.wrap(value, 1, 4).getInt();
                    if (!schemas.containsKey(id)) {
                        schemas.put(id, fetch(registry, id));
                    }
                    GenericRecord bar = new GenericDatumReader<GenericRecord>(schemas.get(id))
                            .read(null, DecoderFactory.get().binaryDecoder(value, HEADER_BYTES, value.length - HEADER_BYTES, null));
                    System.out.println(record.key() + " " + bar.get("open_time_us") + " " + bar.get("close") + " " + bar.get("volume"));
                    if (--count == 0) {
                        return;
                    }
                }
            }
            throw new IllegalStateException("no bars within 30 s: is the stack up and a source running?");
        }
    }

    private static Schema fetch(String registry, int id) throws Exception {
        HttpRequest request = HttpRequest.newBuilder(URI.create(registry + "/schemas/ids/" + id)).build();
        String body = HttpClient.newHttpClient().send(request, HttpResponse.BodyHandlers.ofString()).body();
        // {"schema": "<the schema as a JSON string>"}
        String text = new com.fasterxml.jackson.databind.ObjectMapper().readTree(body).get("schema").asText();
        return new Schema.Parser().parse(text);
    }
}
