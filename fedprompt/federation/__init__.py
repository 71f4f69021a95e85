"""One round: sampling, exchange, checks of replies, the strategies' contract, server and client."""
