"""All arithmetic on arrays: bars and what is computed from them. Knows no Kafka, socket, clock or randomness. Imports schemas only."""
