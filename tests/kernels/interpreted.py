"""Run with TRITON_INTERPRET=1, which Triton reads when kernels are defined: prints what is wrong with them, as JSON.

``interpreted.py`` tries the kernels of the project; ``interpreted.py mutants.json FOLDER`` tries each of a list of mutants
{name: [[old, new], ...]}, written into FOLDER, until one trial fails.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from pathlib import Path
from types import ModuleType

from tests.kernels.gate_cases import TRIALS, failures
from trainer.kernels import gate_triton

SOURCE = Path(gate_triton.__file__)


def mutant(name: str, changes: list[list[str]], folder: Path) -> ModuleType:
    text = SOURCE.read_text()
    for old, new in changes:
        if old not in text:
            raise ValueError(f"mutant {name!r}: gate_triton.py has no {old!r}")
        text = text.replace(old, new, 1)
    path = folder / f"mutant_{''.join(c if c.isalnum() else '_' for c in name)}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def first_failure(kernels: ModuleType) -> str | None:
    for trial in TRIALS:
        try:
            found = failures(kernels, trial)
        except Exception as error:  # noqa: BLE001  a mutant may fail in any way
            found = [repr(error)]
        if found:
            return f"{trial.name}: {found[0]}"
    return None


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # numpy's, of inf and nan: they are meant
    if len(sys.argv) > 1:
        mutants = json.loads(Path(sys.argv[1]).read_text())
        answer = {name: first_failure(mutant(name, changes, Path(sys.argv[2]))) for name, changes in mutants.items()}
    else:
        answer = {trial.name: failures(gate_triton, trial) for trial in TRIALS}
    print(json.dumps(answer))
