"""The fingerprint of a base model, equal for all copies that an adapter fits."""

import hashlib
import json
from pathlib import Path

from adapters.errors import AdapterError
from adapters.tensors import BadTensors, read_header

# The keys that every copy of config.json has. Saving again adds or drops other keys (head_dim, num_key_value_heads,
# tie_word_embeddings), which follow from these and from the names and shapes of the tensors.
_STRUCTURE = (
    "architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "vocab_size",
)  # fmt: skip


def fingerprint(base_model_folder: Path) -> str:
    """Return 16 hexadecimal digits over the structure, the vocabulary, and the names and shapes of all tensors.

    Copies in other dtypes, in other shards or from other library versions have the same fingerprint; a model of another
    size, vocabulary or architecture has a different one. Other weights of the same shapes also have the same one:
    golden prompts tell those apart. Raises AdapterError if the folder has no base model.
    """
    name = base_model_folder.name
    try:
        config = json.loads((base_model_folder / "config.json").read_bytes())
        facts = {
            "config": {key: config.get(key) for key in _STRUCTURE},
            "vocabulary": _vocabulary(base_model_folder),
            "tensors": sorted(
                (spec.name, spec.shape)
                for file in base_model_folder.glob("*.safetensors")
                for spec in read_header(file).values()
            ),
        }
    except BadTensors as error:
        raise AdapterError(f"{name}: {error}") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise AdapterError(f"{name} has no readable config.json and tokenizer of a base model") from error
    if not facts["tensors"]:
        raise AdapterError(f"{name} has no *.safetensors: save the base model as safetensors")
    return _digest(facts)[:16]


def _vocabulary(folder: Path) -> str | None:
    """Return the digest of the tokens and their ids; saving again rewrites the rest of tokenizer.json."""
    if (folder / "tokenizer.json").is_file():
        saved = json.loads((folder / "tokenizer.json").read_bytes())
        added = sorted((token["id"], token["content"]) for token in saved["added_tokens"])
        return _digest([saved["model"]["vocab"], added])
    for name in ("tokenizer.model", "vocab.json"):
        if (folder / name).is_file():
            return hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return None


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
