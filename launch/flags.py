"""The one way from a command line to a program: flags, the config file and its overrides.

Every mistake a user can make there ends in one line on stderr and exit code 2. This module must not
import jax, so that a mistyped flag is answered at once and XLA's flags can still be set.

    from launch.flags import run
    from launch.paths import define_workdir

    _WORKDIR = define_workdir()

    def main(config):  # a frozen moe_jax.config.Config
      ...

    if __name__ == "__main__":
      run(main, devices=True)
"""

import difflib
import dis
import io
import re
import sys
import traceback
from collections.abc import Callable, Sequence

from absl import flags, logging
from ml_collections import config_flags

from launch import config_file, environment, help_text
from moe_jax import config as config_lib

FLAGS = flags.FLAGS
BAD_INPUT, INTERRUPTED = 2, 130  # exit codes; 130 is 128 + SIGINT, as shells expect
_OUR_PACKAGES = ("moe_jax", "launch", "configs", "__main__")

flags.DEFINE_boolean(
  "traceback", False, "show the traceback of errors that otherwise take one line"
)


def run(
  main: Callable,
  *,
  config: bool = True,
  default_config: str | None = None,
  devices: bool = False,
) -> None:
  """Parses the command line, calls `main` and exits with what it returns (None is success).

  Bad input, found here or raised by `main` (a ValueError or NotImplementedError that this project
  phrased, or any OSError), prints one line and exits with 2. Every other exception is a bug and
  keeps its traceback.

  Args:
    main: called with the frozen Config, or with nothing where `config` is False.
    config: whether the program takes `--config=FILE` and `--config.section.field=value`.
    default_config: the file that absence of `--config` means; None makes the flag required.
    devices: whether the program computes: adds `--virtual_devices`, `--scheduling_profile` and
      `--symmetric_memory`, and sets XLA's flags.
  """
  if devices:
    flags.DEFINE_integer(
      "virtual_devices", 0, "number of CPU devices to simulate; 0 uses the live ones", lower_bound=0
    )
    flags.DEFINE_string(
      "scheduling_profile", "", "file of launch.rehearse --profile, by which XLA schedules for GPUs"
    )
    flags.DEFINE_boolean(
      "symmetric_memory",
      False,
      "let GPUs of a host register memory with each other, which shortens short collectives; needs"
      " NCCL 2.30.7 or newer",
    )
  argv = sys.argv
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):  # of any encoding: a text may hold what it has not
      stream.reconfigure(errors="backslashreplace")
  if help_text.is_asked(argv):
    print(help_text.text(sys.modules[main.__module__], argv, config, default_config))
    sys.exit(0)
  try:
    arguments = _parse(argv, config, default_config)
    # absl.app.run would do this and much else; it makes --verbosity and --log_dir work.
    logging.use_absl_handler()
    if devices and FLAGS.virtual_devices:
      _refuse_of_gpus()
      environment.keep_freed_memory(FLAGS.virtual_devices)
      environment.virtual_devices(FLAGS.virtual_devices)
    elif devices:
      environment.live_devices(FLAGS.scheduling_profile, FLAGS.symmetric_memory)
    code = main(*arguments)
  except KeyboardInterrupt:
    code = _report("interrupted", INTERRUPTED)
  except (ValueError, NotImplementedError, OSError) as error:
    if not _is_message(error):
      raise
    if FLAGS["traceback"].value or "--traceback" in argv:  # the parse may not have got there
      traceback.print_exception(error)
    code = _report(f"error: {_message(error)}", BAD_INPUT)
  sys.exit(code)


def _refuse_of_gpus() -> None:
  for name in ("scheduling_profile", "symmetric_memory"):
    if FLAGS[name].value:
      raise ValueError(
        f"--{name} is for GPUs, and --virtual_devices={FLAGS.virtual_devices} simulates CPUs; leave"
        " one of the two out"
      )


def _parse(argv: Sequence[str], config: bool, default_config: str | None) -> list:
  program, *words = argv
  try:
    words = FLAGS.read_flags_from_files(words, force_gnu=False)
    if config:
      path, words = config_file.take_path(words, default_config)
      overrides = config_file.overrides(words)
      config_flags.DEFINE_config_dict("config", config_file.load(path), sys_argv=overrides)
    positional = FLAGS([program, *words])[1:]
  except flags.UnrecognizedFlagError as error:
    raise ValueError(_unknown(error.flagname, words, config)) from error
  except flags.IllegalFlagValueError as error:
    raise ValueError(_illegal(error)) from error
  except (flags.Error, ValueError) as error:  # absl raises a bare one for --noname=value
    raise ValueError(str(error)) from error
  if positional:
    raise ValueError(_misplaced(positional[0], config))
  return [config_lib.from_mapping(FLAGS.config)] if config else []


def _known(config: bool) -> list[str]:
  config_names = config_file.flag_names() if config else []
  return [*help_text.own_flags(), *help_text.NAMES, *config_names]


def _unknown(name: str, words: Sequence[str], config: bool) -> str:
  word = next(
    (w for w in words if w.lstrip("-").partition("=")[0] == name.lstrip("-")), f"--{name}"
  )
  if re.match(r"-*(no)?config\b", word) and not config:
    return f"{word}: this program takes no --config; see --help"
  near = difflib.get_close_matches(name.lstrip("-"), _known(config), 1)
  return f"{word} is not a flag; {f'did you mean --{near[0]}?' if near else 'see --help'}"


def _illegal(error: flags.IllegalFlagValueError) -> str:
  # absl keeps name and value only in the text, "flag --name=value: reason".
  match = re.match(r"flag --([^=]*)=", str(error))
  if not match or match[1] not in FLAGS:
    return str(error)
  flag = FLAGS[match[1]]
  if error.__context__ is None:  # a validator's; that of required=True is the common one
    first = str(error).partition("\n")[0].removeprefix("flag ")
    return f"--{flag.name} is missing; {flag.help}" if flag.value is None else first
  reason = str(error.__context__)
  value = str(error)[match.end() :].removesuffix(f": {reason}")
  kind = flag.flag_type()
  if kind == "string enum":
    near = difflib.get_close_matches(value, flag.parser.enum_values, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"--{flag.name}={value} is not one of {', '.join(flag.parser.enum_values)}{hint}"
  expected = {"bool": "true or false"}.get(kind, getattr(flag.parser, "syntactic_help", ""))
  return f"--{flag.name}={value} is wrong; expected {expected or reason}"


def _misplaced(word: str, config: bool) -> str:
  name, equals, _ = word.partition("=")
  known = equals and name in _known(config)
  hint = f"did you mean --{word}?" if known else "flags are --name=value, switches --name"
  return f"{word} does not belong to a flag; {hint}"


def _is_message(error: Exception) -> bool:
  """Whether `error` is an answer to bad input, and not a bug that happens to share its type.

  A ValueError that jax or numpy raises tells nothing to who typed the command, and its traceback
  is all there is to find it by. So: ours are those that a `raise` statement of this project raised.
  """
  if isinstance(error, OSError):
    return True
  last = error.__traceback__
  while last.tb_next:
    last = last.tb_next
  frame = last.tb_frame  # jax and numpy's C code leave no frame: then this one is at a call
  package = frame.f_globals.get("__name__", "").partition(".")[0]
  raised_here = frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
  return package in _OUR_PACKAGES and raised_here


def _message(error: Exception) -> str:
  if isinstance(error, OSError) and error.filename is not None:
    return f"{error.filename}: {error.strerror}"
  return str(error)


def _report(line: str, code: int) -> int:
  print(" ".join(line.split()), file=sys.stderr)
  return code
