"""Checkpoints of others: read without running anything in them, accounted for tensor by tensor.

files.py         tensors out of .safetensors, .pt and .ckpt files
torchscript.py   and out of TorchScript archives
matching.py      names of two implementations; what a file holds against what a model expects
clip.py          OpenAI's CLIP → our text tower
convert.py       any of them → a checkpoint folder of ours
inspect.py       what is in a file or folder
export.py        a policy of ours → one folder with all that acting needs, and the hub

The adapter of a stage's published weights lies in that stage: `Step1_GFDM.adapter`, `Step2_GIDM.adapter`,
`Step3_DeFI.adapter`.
"""
