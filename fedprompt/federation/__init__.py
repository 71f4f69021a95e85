"""One round: server app, client app, strategy contract, checks of replies."""
