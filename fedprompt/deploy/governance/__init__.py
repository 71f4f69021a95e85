"""What a node decides and remembers about the requests of a server. Runs on a node.

`policy.py` says what the node answers, `ledger.py` how much privacy its data have spent, `audit.py`
what was asked and what has left. `gate.py` applies the three to every message. No message of a
server changes any of them: the policy is a file of the node, and both records only grow.
"""
