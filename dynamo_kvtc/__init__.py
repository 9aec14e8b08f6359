"""KV cache transform coding: a compression tier for NVIDIA Dynamo's KV Block Manager and vLLM.

Read ``dynamo_kvtc/codec/pipeline.py`` first.
"""

__version__ = "0.1.0"
