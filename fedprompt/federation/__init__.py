"""One round of federated learning, as simulations and deployments both run it.

server_app      the server's side: `Federation` trains and evaluates one round at a time
refusals        what they cannot do together, refused before anything is trained
sampling        which clients train in a round
asynchronous    the same without rounds: FedBuff's steps
presence        who can be asked in a round of a simulation, who answers, and how late
trace           which clients of a simulation are there
clock           how many seconds they take in a simulation
strategy        the contract of all server strategies; the strategies are in `strategies/`
registry        strategies by name
exchange        sends the training messages and returns the updates
screening       which replies count
client_app      the client's side: `handle` answers the messages of one or more clients
client_tests    exchanges in which clients evaluate
protocol_results  what the evaluation protocols of a run measure
scores          statistics of personal models
checkpoint      the state between two rounds
grid            the base class of the grids in `fedprompt.simulation` and `fedprompt.deploy`
"""
