"""Messages between server and clients: records, bytes, and what a training exchange returns.

This package is the only one, with `fedprompt.privacy.secure_aggregation.flower`, that touches the
private parts of Flower. Of fedprompt, it imports `runtime.peer_text` only.
"""

from fedprompt.messages.answers import MAX_EXAMPLES, Answers, Ranges, Refused, read_answers
from fedprompt.messages.exchange import Exchanged, Send, Traffic, Update
from fedprompt.messages.flower import (
    SERVER_NODE,
    Run,
    become_server,
    empty_run,
    from_wire,
    records_from_wire,
    records_to_wire,
    set_new_id,
    to_wire,
)
from fedprompt.messages.parcels import (
    CLIENT_FAILED,
    FIRST_NODE,
    Parcel,
    client_of,
    failure,
    node_of,
    to_parcels,
)
from fedprompt.messages.records import (
    ARRAYS,
    CONFIG,
    EXTRAS,
    METRICS,
    REST,
    SITE,
    Arrays,
    error_reason,
    to_array,
    to_arrays,
    to_record,
    values_of,
)

__all__ = [
    "ARRAYS",
    "CLIENT_FAILED",
    "CONFIG",
    "EXTRAS",
    "FIRST_NODE",
    "MAX_EXAMPLES",
    "METRICS",
    "REST",
    "SERVER_NODE",
    "SITE",
    "Answers",
    "Arrays",
    "Exchanged",
    "Parcel",
    "Ranges",
    "Refused",
    "Run",
    "Send",
    "Traffic",
    "Update",
    "become_server",
    "client_of",
    "empty_run",
    "error_reason",
    "failure",
    "from_wire",
    "node_of",
    "read_answers",
    "records_from_wire",
    "records_to_wire",
    "set_new_id",
    "to_array",
    "to_arrays",
    "to_parcels",
    "to_record",
    "to_wire",
    "values_of",
]
