"""What the build adds to pyproject.toml: addresses, and the README with links that hold outside of the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def absolute_links(text: str, repository: str, version: str) -> str:
    """Markdown whose relative links and pictures are those of the repository at the tag of this version."""
    raw = repository.replace("https://github.com", "https://raw.githubusercontent.com")
    text = re.sub(r"(!\[[^\]]*\]\()(?!\w+:|#)", rf"\g<1>{raw}/v{version}/", text)
    return re.sub(r"(?<!!)(\[(?:`[^`]*`|[^\]`])*\]\()(?!\w+:|#)", rf"\g<1>{repository}/blob/v{version}/", text)


def urls(repository: str) -> dict[str, str]:
    """Those that the package index shows."""
    owner, name = repository.removeprefix("https://github.com/").split("/")
    return {
        "Documentation": f"https://{owner.lower()}.github.io/{name}/",
        "Repository": repository,
        "Issues": f"{repository}/issues",
        "Changelog": f"{repository}/blob/main/CHANGELOG.md",
    }


def get_metadata_hook() -> type[Any]:
    """What hatchling asks for; it is there only while a package is built."""
    from hatchling.metadata.plugin.interface import MetadataHookInterface  # noqa: PLC0415

    class Hook(MetadataHookInterface):
        def update(self, metadata: dict[str, Any]) -> None:
            repository = self.config["repository"]
            readme = Path(self.root, "README.md").read_text(encoding="utf-8")
            text = absolute_links(readme, repository, metadata["version"])
            metadata["readme"] = {"content-type": "text/markdown", "text": text}
            metadata["urls"] = urls(repository)

    return Hook
