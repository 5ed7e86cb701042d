"""SAELens's metadata of a dictionary, as far as anything here reads it: types and bounds, for a stranger's."""

from __future__ import annotations

from typing import Any

from packaging.version import InvalidVersion, Version
from pydantic import field_validator, model_validator
from sae_lens.saes.sae import SAEMetadata

from aen_lightning.files.checked import Count, Flag, Foreign, Size, Text

_TEMPLATE = SAEMetadata()


class Provenance(Foreign):
    """What ``aen push`` collected of the training, as far as a model card shows it."""

    evaluation: dict[str, float | None] | None = None
    training_metrics: dict[str, float | None] | None = None
    n_training_samples: Count | None = None
    n_training_steps: Count | None = None
    environment_at_publishing: dict[str, Text] | None = None
    git_commit_at_publishing: Text | None = None
    recipe: dict[str, Any] | None = None


class Metadata(Foreign):
    """What ``cfg.json`` keeps under ``metadata``, and a set of shards too. Other keys are free.

    SAELens sets every key as an attribute of an object, so a key may not be the name of one of its methods.
    """

    sae_lens_version: Text | None = None
    sae_lens_training_version: Text | None = None
    model_name: Text | None = None
    model_class_name: Text | None = None
    revision: Text | None = None
    model_from_pretrained_kwargs: dict[str, Any] | None = None
    hook_name: Text | list[Text] | None = None
    hf_hook_name: Text | None = None
    hf_hook_names: dict[str, Text | None] | None = None
    hook_head_index: Count | None = None
    dataset_path: Text | list[Text] | None = None
    dataset_name: Text | None = None
    dataset_split: Text | None = None
    context_size: Size | None = None
    prepend_bos: Flag | None = None
    sequence_separator_token: Text | int | None = None
    exclude_special_tokens: Flag | list[int] | None = None
    held_out_documents: Count | None = None
    norm_outlier_multiple: float | None = None
    synthetic_data: dict[str, Any] | None = None
    training_architecture: Text | None = None
    training_architecture_details: dict[str, Any] | None = None
    provenance: Provenance | None = None

    @field_validator("sae_lens_version")
    @classmethod
    def _is_version(cls, value: str | None) -> str | None:
        return version_number(value)

    @model_validator(mode="before")
    @classmethod
    def _keys_are_free(cls, content: Any) -> Any:
        for key in content if isinstance(content, dict) else ():
            if key == "self" or (key in dir(_TEMPLATE) and key not in vars(_TEMPLATE)):
                raise ValueError(f"expected keys that SAELens can set, not {key!r}, the name of a method")
        return content


def version_number(value: str | None) -> str | None:
    """``value`` if it is a version.

    Raises:
        ValueError: If it is none.
    """
    try:
        if value:
            Version(value)
    except InvalidVersion as error:
        raise ValueError("expected a version such as 6.54.0") from error
    return value
