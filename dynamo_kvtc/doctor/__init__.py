"""What this machine and environment can run, and what to do about the rest: `kvtc doctor`.

run.py       READ FIRST: which lines there are, and what each purpose needs
software.py  packages, by their metadata alone: no engine is imported to learn its version
machine.py   memory, disk, locked memory, NATS
gpu.py       the GPU, asked by a process of its own: a broken driver may hang or crash whoever asks it
artifact.py  an artifact, and the model it is to serve
"""
