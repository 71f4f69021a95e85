"""A real federation: one server and N nodes, connected over TLS, with authenticated nodes.

Where each module runs:

On the administrator's terminal
    monitoring          `deploy status`: the state as text, page and metrics
    joining             `deploy request, approve, join, revoke`: nodes with keys of their own
    new_federation      `deploy init`: keys, certificates and settings of a new federation
    credentials         the only module that knows about certificates and keys
    folders             the server's and a node's folder, and the commands that run in them
    addresses           checks of host names, IP addresses and ports
    submit, bundle      `deploy run`: hands an experiment to the SuperLink and follows it
    withdraw            `deploy withdraw`: repeats a run without one site
    submission          what the server app needs to know and nodes must not, in a file
    flower_commands     calls of Flower's own `flwr` command
    local, example      `deploy local` and `deploy example`: everything on one machine

In `deploy server` and `deploy node`, the processes that supervise others
    supervise           which processes run, and when they are started again
    processes, guard    a group of child processes that ends as a whole, and with its parent
    ownership           one owner per folder
    key_registration    makes the nodes' public keys known to the SuperLink
    expiry, diagnosis   dates of certificates; why the two sides refuse each other
    reach               a call to the server by the way that Flower's calls take
    connection          turns a SuperNode's log into lines for the node's administrator

In processes that they start on the server
    fleet_proxy         the only port that nodes can reach
    server_app          Flower's ServerApp: the run itself
    node_federation, node_grid, node_registry
                        the run's federation, its exchanges with nodes, and who has joined

In processes that they start on a node
    client_app          Flower's ClientApp: a new, small process for every message
    worker_client       passes the message from there to the worker
    worker, node        the process that holds PyTorch and CLIP and answers the message
    node_config         what the node decides for itself
    governance          its policy, its privacy ledger and its audit log
    private_store       the node's private prompts on disk
    node_model          the rest of its personal model, for `deploy predict` and `deploy export`

On both sides
    node_report         what a node reports when it joins, written there and checked here
    backbone_check      whether both sides have the same frozen CLIP
    versions            whether both sides run versions that fit together
"""
