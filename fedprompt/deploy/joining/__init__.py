"""How a node joins a federation without sending a private key, and how it is shut out again.

    on the node     deploy request   makes the key there, and a request file for the server
    on the server   deploy approve   makes a package file for the node, and lets its key in
    on the node     deploy join      unpacks it; both sides compare the code that the two print
    on the server   deploy revoke    shuts the node out at once

Neither file is a secret. Whoever can replace both on their way could pose as the server to the node
and as the node to the server, so both administrators compare the code over a channel that they
trust, such as a telephone call: it is a hash of everything in the package.
"""
