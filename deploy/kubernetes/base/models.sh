# Writes the configuration that TF Serving starts with: the releases that stand in the base paths, as after the last act.
# A model without a version is left out, since TF Serving would wait for one before it answers anything.
set -eu
{
  echo 'model_config_list {'
  for model in recall rank; do
    base="$PENSTOCK_HOME/models/$model"
    if ls "$base" 2>/dev/null | grep -q '^[0-9]'; then
      echo "  config { name: '$model' base_path: '$base' model_platform: 'tensorflow' model_version_policy { all {} } }"
    fi
  done
  echo '}'
} > "$1"
cat "$1"
