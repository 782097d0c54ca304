package org.example.substation;

import java.util.ArrayList;
import java.util.List;
import java.util.Objects;

public final class Feeder {
    private final String name;
    private final List<Double> loads = new ArrayList<>();

    public Feeder(String name) {
        this.name = Objects.requireNonNull(name, "name");
    }

    public void record(double load) {
        if (load < 0) {
            throw new IllegalArgumentException("negative load: " + load);
        }
        loads.add(load);
    }

    @Override
    public String toString() {
        return name + ": " + loads.stream().mapToDouble(Double::doubleValue).max().orElse(0);
    }
}
