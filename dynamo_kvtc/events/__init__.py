"""Who holds which record, told over NATS. READ FIRST: this, then publisher.py and follower.py.

    a tier's thread -> Publisher -> batches -> stream and subscribers -> Follower -> Index <- whoever looks a prefix up
                           `-- heartbeats in a bucket, a page of all it holds for whoever asks

    nats.py       the one door to NATS: a connection found again for ever; nats_client.py (the library),
                  options.py, inbox.py are its parts
    jetstream.py  streams and buckets, over that door's requests
    schema.py     the messages: tagged, versioned, bounded, checked whole
    publisher.py  this worker's events out, in batches, never waited for; holdings.py answers for all it holds
    follower.py   everybody else's events in, healed where something is missing; peers.py puts them in order
    index.py      key -> holders, in memory that never grows
    board.py      what `kvtc watch` shows

Events tell of what was durable when they were sent; what they say may be over when it is read. So nothing here is a
promise: a pull that finds nothing is a miss, and the engine computes.
"""
