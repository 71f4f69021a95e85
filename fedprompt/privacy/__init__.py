"""Protection of the clients' updates, and attacks that measure how much it is worth.

local_noise          noise that a client adds to its update before it is sent
accountant           the epsilon that noise costs over many rounds
releases             what has been released with noise, recorded so that no release is forgotten
secure_aggregation   the server learns the sum of the updates only; runs on both sides
inversion            what an attacker can infer from an update; used by the privacy protocols
"""
