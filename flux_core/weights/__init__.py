"""Model files → modules.

- one file or a set: `files` (which files a path means), `checkpoint` (opening, reading), `gguf`
- keys: `key_map`, `transformer_keys`, `autoencoder_keys`, `text_keys`, `gguf_text`
- what a file is: `detect` (sizes, family), `kinds` (what else it may be)
- quantised weights: `quantised` (which, and how), `dequantise` (the arithmetic)
- loading: `load` (transformer, autoencoder), `load_text`, `convert` (dtypes, what stays quantised)
- LoRAs: `lora_keys` (trainers' names to ours), `lora_fit` (against a model), `lora` (the values),
  `lora_strengths`
"""
