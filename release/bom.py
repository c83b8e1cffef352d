"""The bill of materials of an image, as CycloneDX JSON: `python -m release.bom IMAGE --docker CLIENT >NAME.cdx.json`.

Python packages with the hashes of their lock, Debian packages, and the weights as machine-learning components. Standard
library only, so that it runs where the image is built; cyclonedx-python-lib, which would have to be installed there,
validates this JSON in the tests instead. The bill stays beside the image: an attestation inside would make
`docker save` write a second manifest, which the platform refuses.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

from inference import __version__
from inference.errors import UserError

LOCK = Path(__file__).resolve().parent.parent / "requirements/job.txt"  # the image's
PRUNED = {"triton", "cuda-bindings", "cuda-pathfinder"}  # removed by the Dockerfile
# run by the image's own Python: what is really installed
INVENTORY = """
import json, subprocess
from importlib.metadata import distributions
from pathlib import Path
from inference.manifest import load_manifest

def licence(about):
    classes = [c.rsplit(" :: ", 1)[-1] for c in about.get_all("Classifier", []) if c.startswith("License")]
    return about.get("License-Expression") or ", ".join(classes) or (about.get("License") or "").split("\\n")[0][:100]

packages = [[d.metadata["Name"], d.version, licence(d.metadata)] for d in distributions()]
query = ["dpkg-query", "--show", "--showformat", "${Package} ${Version} ${Architecture}\\n"]
debian = [line.split() for line in subprocess.check_output(query, text=True).splitlines()]
manifest = load_manifest(Path("weights/default"))
weights = []
for member in manifest.members:
    source = member.licence.get("base_source", "")
    weights.append([member.base.name, member.base_sha256, member.licence.get("base", ""), source])
    weights += [[f"{file.parent.name}/{file.name}", digest, member.licence.get("adapters", ""), ""]
                for file, digest in member.files.items() if file.suffix == ".safetensors"]
print(json.dumps({"python": packages, "debian": debian, "weights": weights, "ensemble": manifest.name}))
"""


def normal(name: str) -> str:
    """A package's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(lock: Path = LOCK) -> dict[str, tuple[str, list[str]]]:
    """Name to version and SHA-256 sums of a requirements file."""
    entries = re.findall(
        r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)", lock.read_text(), re.M
    )
    return {normal(name): (version, re.findall(r"[0-9a-f]{64}", hashes)) for name, version, hashes in entries}


def make_bom(image: str, identity: str, inventory: dict[str, Any]) -> dict[str, Any]:
    """CycloneDX 1.6 of `image`, whose ID is `identity` and which holds `inventory`.

    Raises UserError where the packages that are installed are not those that the lock pins.
    """
    lock = {name: entry for name, entry in locked().items() if name not in PRUNED}
    installed = {normal(name): version for name, version, _ in inventory["python"]}
    for name in sorted(lock.keys() | installed.keys()):
        pinned = lock.get(name, ("none", []))[0]
        if installed.get(name, "none") != pinned:
            raise UserError(
                f"{image} holds {name} {installed.get(name, 'none')}; {LOCK.name} pins {pinned}; run ./build.sh"
            )
    components: list[dict[str, Any]] = []
    for name, version, licence in inventory["python"]:
        purl = f"pkg:pypi/{normal(name)}@{version}"
        hashes = [{"alg": "SHA-256", "content": digest} for digest in lock[normal(name)][1]]
        files = [{"type": "distribution", "url": purl, "comment": "any of these files", "hashes": hashes}]
        components.append(
            {"type": "library", "name": name, "version": version, "purl": purl, "externalReferences": files}
        )
        components[-1] |= licences(licence)
    for name, version, architecture in inventory["debian"]:
        purl = f"pkg:deb/debian/{name}@{version.replace('+', '%2B').replace(':', '%3A')}?arch={architecture}"
        components.append({"type": "library", "name": name, "version": version, "purl": purl})
    for name, digest, licence, source in dict.fromkeys(map(tuple, inventory["weights"])):
        component = {"type": "machine-learning-model", "name": name, "hashes": [{"alg": "SHA-256", "content": digest}]}
        components.append(component | licences(licence) | ({"description": f"from {source}"} if source else {}))
    components.sort(key=lambda component: (component["type"], component["name"], json.dumps(component)))
    for number, component in enumerate(components):
        component["bom-ref"] = component.get("purl", f"weights-{number}")
    container = {"type": "container", "name": image, "version": __version__, "bom-ref": "image"}
    container["description"] = f"image {identity} with the ensemble {inventory['ensemble']}"
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, identity)}",
        "version": 1,
        "metadata": {"component": container},
        "components": components,
    }


def licences(name: str) -> dict[str, Any]:
    return {"licenses": [{"license": {"name": name}}]} if name else {}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m release.bom", description="Bill of materials of an image.")
    parser.add_argument("image")
    parser.add_argument("--docker", default="docker", metavar="CLIENT")
    options = parser.parse_args(arguments)
    inspect = [options.docker, "image", "inspect", "--format", "{{.Id}}", options.image]
    inside = [
        options.docker,
        "run",
        "--rm",
        "--network",
        "none",
        "--entrypoint",
        "python",
        options.image,
        "-c",
        INVENTORY,
    ]
    try:
        identity, inventory = (subprocess.check_output(command, text=True) for command in (inspect, inside))
        print(json.dumps(make_bom(options.image, identity.strip(), json.loads(inventory)), indent=1))
    except (UserError, OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"no bill of materials: {error}" if not isinstance(error, UserError) else error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
