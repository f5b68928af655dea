# A role and a database of its own for each; run once, when the volume is empty. The image reads it into its own shell.
database() {
  psql --set=ON_ERROR_STOP=1 --quiet --username "${POSTGRES_USER:-postgres}" --dbname postgres --set=name="$1" --set=password="$2" <<'SQL'
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
REVOKE CONNECT ON DATABASE :"name" FROM PUBLIC;
SQL
}
database airflow "$AIRFLOW_PASSWORD"
database mlflow "$MLFLOW_PASSWORD"
database feast "$FEAST_PASSWORD"
