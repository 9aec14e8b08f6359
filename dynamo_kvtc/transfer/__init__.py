"""Records between workers. READ FIRST: how one comes from a holder's store into an asker's memory.

    pull.py      the asker: shares keys out among their holders, asks again elsewhere, says what has arrived
    arriving.py  one record on its way: which bytes are here, which layer groups are proven
    serve.py     the holder: answers from its store, within a budget of leased bytes
    wire.py      the messages, bounded and versioned
    plane.py     what carries frames; tcp.py, nats.py and nixl.py are the ones there are

An asker sends an *ask*: keys, and which layer groups of each. The holder answers with the bytes in the order of layer
groups: every record's header and section of group 0, then every section of group 1, and so on, so that group 0 is
decoded while the others travel. Bytes say where in which record they belong, so frames may be cut anywhere, come twice
or in any order.

A piece (a record's section) counts as arrived once the header is proven and is that of the codec at hand, and the
section's own checksum is right. Before that nobody sees it, afterwards none of its bytes changes. A piece that is
missing, damaged or late is asked of another holder; it must belong to the very same record, by the header's checksum.
What nobody gives in time is reported as failed, for the engine to compute.

What this does not protect from: a holder inside the namespace that sends another record than the key's, whole and of
the same codec, position and length. Only credentials do.
"""
