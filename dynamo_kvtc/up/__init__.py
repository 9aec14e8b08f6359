"""A deployment's manifest, run on this machine. READ FIRST: run.py.

run.py         what `kvtc up` does, in its order
manifest.py    the file: which components with which commands, arguments and environment
schema.py      what a DynamoGraphDeployment may contain; kubernetes.py: the same of what it is made of
place.py       what must be another here than in the cluster, every change told
supply.py      a model and an artifact where the manifest expects its volumes
settings.py    kv-transfer-config, judged by the connectors' own parsers
processes.py   start, watch, end
client.py      is it ready; one chat completion
"""
