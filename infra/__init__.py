"""Settings, clients, command line, local stack and entry points: what puts the pure parts together."""
