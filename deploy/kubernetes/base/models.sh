# Writes the configuration that TF Serving starts with: the releases that stand in the base paths, as after the last act.
# A model without a version is left out, since TF Serving would wait for one before it answers anything.
set -eu
{
  echo 'model_config_list {'
  for model in recall rank; do
    base="$PENSTOCK_HOME/models/$model"
    versions=$(ls "$base" 2>/dev/null | sed -n 's/^\([0-9][0-9]*\)$/versions: \1/p' | tr '\n' ' ')
    if [ -n "$versions" ]; then
      echo "  config {"
      echo "    name: '$model' base_path: '$base' model_platform: 'tensorflow'"
      echo "    model_version_policy { specific { $versions} }"
      echo "  }"
    fi
  done
  echo '}'
} > "$1"
cat "$1"
