"""Frozen image-language encoders behind one small interface.

What a directory (or hub repository) needs: the files that `transformers` itself writes.

- `config.json` with `model_type` "clip" or "siglip" (SigLIP2 of fixed resolution says "siglip").
  CLIP reads a text's embedding at the token `text_config.eos_token_id`; the value 2 stands for an
  old convention (the highest id in the text). Loading checks that the tokenizer ends its texts
  with that very token, as nothing else would tell.
- `model.safetensors`, or shards with `model.safetensors.index.json`. Pickled weights are refused.
- The tokenizer: `tokenizer.json` (best), or `vocab.json` + `merges.txt`, or `spiece.model`. With a
  vocabulary of one's own, `tokenizer_config.json` must name `PreTrainedTokenizerFast` as
  `tokenizer_class` (as its `save_pretrained` does, under its newer name): without it `transformers`
  rebuilds `tokenizer.json` after CLIP's own rules. It must name `pad_token` as well.
- `preprocessor_config.json` with size, crop, filter, mean and standard deviation. Without it the
  values that CLIP or SigLIP were published with are taken, at the vision tower's image size.

`CLIPModel.save_pretrained` and `tokenizer.save_pretrained` write all but the last.
"""

from videodistill.encoders.encoder import FrameFeatures, ImageTextEncoder, TextFeatures
from videodistill.encoders.loading import load_encoder
from videodistill.encoders.preprocess import FrameTransform

__all__ = ["FrameFeatures", "FrameTransform", "ImageTextEncoder", "TextFeatures", "load_encoder"]
