#!/bin/sh
set -eu

target="${1:?usage: backup.sh FOLDER}"
stamp=$(date +%Y-%m-%d)

if [ ! -d "$target" ]; then
    mkdir -p "$target"
fi

for database in /var/lib/substation/*.db; do
    name=$(basename "$database" .db)
    echo "saving $name"
    gzip -c "$database" > "$target/$name-$stamp.db.gz"
done

find "$target" -name '*.gz' -mtime +30 -exec rm -f {} \;
