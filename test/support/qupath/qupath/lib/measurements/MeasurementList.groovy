// Stand-in for qupath.lib.measurements.MeasurementList (QuPath 0.6, whose methods of 0.3 are gone).
package qupath.lib.measurements

class MeasurementList {
    final Map<String, Double> values = [:]

    void put(String name, double value) { values[name] = value }
    double get(String name) { values.containsKey(name) ? values[name] : Double.NaN }
    void putAll(MeasurementList list) { values.putAll(list.values) }
}
