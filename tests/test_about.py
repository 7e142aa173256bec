"""What is listed is what there is."""

import subprocess
import sys

from rankwise import about, methods
from rankwise.named import defaults


def test_methods_are_listed_as_they_are_without_being_imported() -> None:
    found = about.methods().content
    assert list(found) == sorted(methods.registry())
    for name, method in methods.registry().items():
        assert found[name]["summary"] == (method.__doc__ or "").partition("\n")[0]
        assert found[name]["options"] == defaults(method), name
        assert list(found[name]["options"]) == list(defaults(method))


def test_the_list_of_methods_needs_no_torch() -> None:
    script = (
        "import sys; sys.argv = ['rankwise', 'methods']\n"
        "from rankwise.cli import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "\nlora: " in done.stdout
