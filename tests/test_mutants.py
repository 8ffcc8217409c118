"""The list of hand-made faults stays true as the code moves; `make mutants` applies them."""

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"mutants_{name}", HERE / "mutants" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


FAULTS = load("faults").FAULTS


def test_every_fault_has_its_place():
    # The text that it replaces is found once; a changed line takes its fault with it.
    files = {fault.file: (ROOT / fault.file).read_text(encoding="utf-8") for fault in FAULTS}
    stale = [(fault.name, fault.file) for fault in FAULTS if files[fault.file].count(fault.old) != 1]
    assert not stale
    assert all(fault.old != fault.new and fault.breaks and fault.tests for fault in FAULTS)


def test_there_are_many_of_different_names():
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names) >= 150
    rooms = {Path(fault.file).parts[1] for fault in FAULTS if fault.file.startswith("remax/")}
    assert rooms >= {path.name for path in (ROOT / "remax").iterdir() if path.is_dir() and path.name[0] != "_"} - {
        "demo"
    }


def test_faulty_files_are_still_python():
    # A fault that cannot be parsed would be noticed by any test.
    for fault in FAULTS:
        if fault.file.endswith(".py"):
            text = (ROOT / fault.file).read_text(encoding="utf-8")
            compile(text.replace(fault.old, fault.new), fault.file, "exec")


def test_named_tests_exist():
    sys.path.insert(0, str(HERE / "references"))
    try:
        from cases import CASES
    finally:
        sys.path.remove(str(HERE / "references"))
    for fault in FAULTS:
        for test in fault.tests:
            if isinstance(test, str):
                path, _, function = test.partition("::")
                text = (ROOT / path).read_text(encoding="utf-8")
                assert not function or f"def {function}(" in text, test
            else:
                ranks, case = test
                assert case in CASES[ranks], test
