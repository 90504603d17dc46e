"""REST routes and the WebSocket hub over history and the live tail. Imports schemas."""
