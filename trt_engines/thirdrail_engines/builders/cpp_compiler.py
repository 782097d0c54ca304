# SPDX-License-Identifier: Apache-2.0
"""The C++ compiler of a build, told to make libraries that can be unloaded.

PyTorch's generated code compiles to libraries that dlclose leaves mapped, for two reasons:

- variables of templates and inline functions are "unique" symbols, of which a process keeps one for
  good, and with it the library that brought it (GCC, -fno-gnu-unique);
- each call leaves a text in a variable that every thread has for itself, whose destructor the C++
  runtime is told of; until each of these threads has ended, the library stays. So the library gets
  a function of its own by that name, which forgets it. A thread that once saw an error then leaves
  the text behind when it ends.

PyTorch takes the name of a compiler and no flags, so it is given a script.
"""

import shlex
import shutil
import subprocess
from pathlib import Path

from thirdrail_engines.plans import BuildError, BuildFault

_COMPILER = "g++"
_COMPILER_S_MAX = 60.0
_ADVICE = "install one, as in: apt install g++"
_WORDS_CHARS_MAX = 500

# Read before each source. Weights come as a source for the assembler.
_HEADER = """
#ifndef __ASSEMBLER__
extern "C" __attribute__((weak, visibility("hidden")))
int __cxa_thread_atexit(void (*)(void*), void*, void*) noexcept { return 0; }
#endif
"""

# A C++ program with what the generated code asks of its compiler.
_TRIAL = """
#include <memory>
#include <span>
#include <string>
static thread_local std::string words;
extern "C" int trial(std::span<int> all) {
  int sum = 0;
  words.clear();
  #pragma omp parallel for reduction(+:sum)
  for (std::size_t i = 0; i < all.size(); ++i) sum += all[i];
  return *std::make_unique<int>(sum);
}
"""


def compiler_in(folder: Path) -> Path:
    """The program to compile with, a new file in `folder`; it has compiled a small library there.

    Raises BuildError: MISSING where there is no C++ compiler, or none that works; REFUSED for a
    folder that PyTorch's commands would take for several words.
    """
    if shlex.quote(str(folder)) != str(folder):
        raise BuildError(
            BuildFault.REFUSED,
            f"AOTInductor does not compile in {folder.parent}: give the plan cache a folder whose "
            "path has no blanks, quotes or other characters that shells know",
        )
    found = shutil.which(_COMPILER)
    if found is None:
        raise BuildError(
            BuildFault.MISSING,
            f"AOTInductor needs a C++ compiler, and there is no {_COMPILER}: {_ADVICE}",
        )
    header, script = folder / "unloadable.h", folder / _COMPILER
    header.write_text(_HEADER)
    command = shlex.join([found, "-fno-gnu-unique", "-include", str(header)])
    script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    script.chmod(0o700)
    _try(found, script, folder)
    return script


def _try(found: str, compiler: Path, folder: Path) -> None:
    source, target = folder / "trial.cpp", folder / "trial.so"
    source.write_text(_TRIAL)
    flags = ["-std=c++20", "-fopenmp", "-fPIC", "-shared"]
    command = [str(compiler), *flags, str(source), "-o", str(target)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_COMPILER_S_MAX, check=False)
    except PermissionError:
        raise BuildError(
            BuildFault.MISSING,
            f"no program can be run in {folder.parent}, where plans are built, and AOTInductor "
            "has to: mount it without noexec",
        ) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(
            BuildFault.MISSING, f"the C++ compiler {found} does not work: {error}"
        ) from None
    if done.returncode != 0:
        words = " ".join(done.stderr.decode(errors="replace").split())[:_WORDS_CHARS_MAX]
        raise BuildError(
            BuildFault.MISSING,
            f"the C++ compiler {found} does not compile C++20 with OpenMP ({words}): {_ADVICE}",
        )
