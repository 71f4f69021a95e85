"""A real federation: one server and N nodes, over TLS and with authenticated nodes."""
