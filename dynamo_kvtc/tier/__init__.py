"""The tier that engines call: blocks of their paged cache out to coded records in host memory and on disk, and back.

tier.py       READ FIRST: the facade; what happens to a block, and what to a failure
options.py    what an operator may set, parsed once and strictly
identity.py   which caches are the same: keys of records
transcode.py  between pages and records: the seam; cpu.py and cuda.py are its two sides, pages.py an engine's layout
lane.py       a thread with a bounded queue and deadlines
overlay.py    exact records of a sequence's tail, beside the coded ones
work.py       what its threads do; build.py: a tier out of its options
estimate.py   whether a restore beats computing again; admission.py: what is worth storing
metrics.py    what is counted, by which names
"""
