"""llm-blender 0.0.2 imports under transformers 5, and other versions are refused by name."""

import importlib.metadata
import subprocess
import sys

import pytest

from sppo_ray import llm_blender_compat
from sppo_ray.errors import ConfigError


def test_import_gives_what_llm_blender_needs_and_can_be_repeated():
    module = llm_blender_compat.import_llm_blender()
    assert llm_blender_compat.import_llm_blender() is module
    import transformers

    assert transformers.utils.hub.TRANSFORMERS_CACHE
    assert callable(transformers.PreTrainedTokenizerBase.batch_encode_plus)
    assert llm_blender_compat.pairrm_class().__name__ == "DebertaV2PairRM"


def test_import_leaves_vllm_out_and_importable():
    code = (
        "import sys, importlib.util; from sppo_ray.llm_blender_compat import import_llm_blender; import_llm_blender();"
        "assert 'vllm' not in sys.modules; assert importlib.util.find_spec('vllm')"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=300, check=False).returncode == 0


def test_module_itself_imports_neither_library():
    code = (
        "import sys, sppo_ray.llm_blender_compat;assert not {'torch', 'transformers', 'llm_blender'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=300, check=False).returncode == 0


@pytest.mark.parametrize(
    ("distribution", "version", "message"),
    [
        ("llm-blender", "0.0.3", r"llm-blender 0\.0\.2: found llm-blender 0\.0\.3 .*pip install llm-blender==0\.0\.2"),
        ("llm-blender", None, "found llm-blender not installed"),
        ("transformers", "4.57.1", r"transformers 5\.x: .*transformers 4\.57\.1\. .*'transformers>=5,<6'"),
        ("transformers", "6.0.0", r"transformers 6\.0\.0"),
        ("transformers", None, "transformers not installed"),
    ],
)
def test_other_versions_are_refused(monkeypatch, distribution, version, message):
    real = importlib.metadata.version

    def fake(name):
        if name != distribution:
            return real(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", fake)
    with pytest.raises(ConfigError, match=message):
        llm_blender_compat.import_llm_blender()
