"""Where simulated clients run: in the server's process, or on Ray actors."""
