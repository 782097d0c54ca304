CREATE TABLE parts (
    serial      VARCHAR(16) PRIMARY KEY,
    kind        VARCHAR(32) NOT NULL,
    rating      NUMERIC(8, 2) NOT NULL CHECK (rating > 0),
    in_service  BOOLEAN NOT NULL DEFAULT TRUE
);

CREATE INDEX parts_by_kind ON parts (kind);

INSERT INTO parts (serial, kind, rating) VALUES
    ('TR-0041', 'transformer', 40.0),
    ('CB-1187', 'breaker', 31.5);

SELECT kind, COUNT(*) AS number, MAX(rating) AS largest
FROM parts
WHERE in_service
GROUP BY kind
HAVING COUNT(*) > 1
ORDER BY number DESC;
