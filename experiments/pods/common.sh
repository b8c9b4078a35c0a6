# What the launch scripts of this folder share; they source it.

quoted() { # words, as a shell reads them back
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

json() { # words, as a list of JSON and YAML; for Kubernetes $( is the start of a variable
  local word list=
  for word in "$@"; do
    word=${word//\\/\\\\}
    word=${word//\"/\\\"}
    list+=", \"${word//\$(/\$\$(}\""
  done
  printf '[%s]\n' "${list#, }"
}

run() { # prints a command, and runs it
  quoted "$@"
  if [[ -z $DRY_RUN ]]; then "$@"; fi
}

read_arguments() { # "$@" and the words of ARGS, where quotes hold one together, in `arguments`
  local line lines
  arguments=("$@")
  if ! lines=$(printf '%s' "$ARGS" | xargs -n 1 printf '%s\n'); then
    echo "error: ARGS=$ARGS: a quote is not closed; close it" >&2
    exit 2
  fi
  while IFS= read -r line; do
    if [[ -n $line ]]; then arguments+=("$line"); fi
  done <<< "$lines"
}
