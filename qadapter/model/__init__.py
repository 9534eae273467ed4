"""The two-stream model: a frozen causal LM and the same LM with a LoRA.

modeling.py          QAdapterModel: owns both streams, runs them for training
two_streams.py       a forward of both for training; values.py: what a loss needs of it
packed_attention.py  a batch without padding; cpu_attention.py, recompute.py: less time, memory
streams.py           all streams in one forward, for decoding; whole_layers.py: a layer as one
                     operation; growing_cache.py: its keys and values
large_pages.py       where weights, keys and values lie on a CPU
decoding.py          the loop: a token a step; generate.py: transformers' arguments for it;
                     decoding_probes.py: what a base needs there, tried
locking.py           calls on one model take turns
sharded.py           parameters that an engine (FSDP2, ZeRO-3) holds in parts
wrapping.py          which models can be composed; adapters.py: which of PEFT's adapters;
                     probe.py: both tried on a few tokens
saving.py            an adapter's files; adapter_files.py: do they fit; checkpoint.py: its base
export.py            a plain LoRA or, by merging.py, whole weights for servers; export_card.py
lora_files.py        a saved LoRA by layer; serving.py: what vLLM is to serve of it;
                     streamed_fingerprint.py: is it for the base that passes by
precision.py         the dtype in which a base is fast on this machine
packaged.py          a small real model that comes as a package
"""
