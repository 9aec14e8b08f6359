"""Quality and size of coded caches, against the uncompressed model and against peers. Start with ``quality.py``.

codecs.py     what a codec is here, raw storage, and records of an artifact
peers.py      fp8, nvfp4 and KIVI, as they are described where they come from
selection.py  codecs by name: "raw,fp8,paper:16,kvtc:kl=0.005"
quality.py    KL, perplexity and agreement of a continuation after a coded context
tasks.py      lambada and passkey: answers after a coded context
report.py     the rows of `kvtc eval`: as JSON, as a table
plot.py       the rows as a picture

To add a peer: a function from float32 values to (values, bits) in peers.py and its name in ``peers.PEERS``.
"""
