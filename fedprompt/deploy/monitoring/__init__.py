"""What the server's administrator sees of a running federation: `deploy status`.

`collect.py` reads the state from files and from Flower, `views.py` turns it into text, a web page
or Prometheus' format, and `serve.py` shows page and metrics on the loopback interface. Nothing here
changes anything.
"""
