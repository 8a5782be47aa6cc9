#!/usr/bin/env bash
# Type-checks the package: mypy --strict on a farm of links that has the layout of an installed wheel.
#
# mypy knows nothing of package_dir, and at the root each file would have two names (trees.tree and
# specdec.trees.tree). So real directories are made under build/typed/specdec with one link per FILE
# (pyright follows no linked directory), and mypy runs in there. The farm is made anew each time, so
# that a deleted module cannot stay visible. Arguments are handed on to mypy; PYTHON names the
# interpreter.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"

python="$(command -v "${PYTHON:-python3}")" || { echo "no interpreter: ${PYTHON:-python3}" >&2; exit 1; }
# mypy runs in another folder; the last link is kept, a virtual environment is known by it
python="$(cd "$(dirname "$python")" && pwd)/$(basename "$python")"

farm="$root/build/typed"
rm -rf "$farm"

link_tree() { # SOURCE_FOLDER TARGET_FOLDER
    local source="$1" target="$2" file
    while IFS= read -r -d '' file; do
        mkdir -p "$target/$(dirname "$file")"
        ln -s "$root/$source/$file" "$target/$file"
    done < <(cd "$source" && find . \( -name '*.py' -o -name '*.pyi' -o -name py.typed \) -print0)
}

link_tree specdec "$farm/specdec"
for folder in trees drafters verifiers kernels; do
    if [ -d "$folder" ]; then link_tree "$folder" "$farm/specdec/$folder"; fi
done

cd "$farm"
exec "$python" -m mypy --config-file "$root/pyproject.toml" --cache-dir "$root/.mypy_cache" \
    --strict -p specdec "$@"
