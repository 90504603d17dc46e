"""SQL migrations of the PostgreSQL database, applied in the order of their numbers."""
