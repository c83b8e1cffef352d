// Stand-in for qupath.lib.geom.Point2 (QuPath 0.6).
package qupath.lib.geom

class Point2 {
    double x, y
}
