"""Routes: one module a resource. A request in, one ``Answer`` or a stream out."""
