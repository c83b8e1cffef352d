// Stand-in for qupath.lib.roi.interfaces.ROI (QuPath 0.6) with what points and polygons without holes need.
package qupath.lib.roi.interfaces

import java.awt.geom.Path2D
import qupath.lib.geom.Point2

class ROI {
    String type  // of GeoJSON: Point, MultiPoint or Polygon
    List<Point2> points
    Object imagePlane = "default"

    boolean isPoint() { type != "Polygon" }
    boolean isArea() { type == "Polygon" }
    int getNumPoints() { points.size() }
    List<Point2> getAllPoints() { new ArrayList(points) }
    Object getImagePlane() { imagePlane }
    double getCentroidX() { centroid()[0] }
    double getCentroidY() { centroid()[1] }

    private List<Double> centroid() {
        if (isPoint()) return [points*.x.sum() / points.size(), points*.y.sum() / points.size()]
        double area = 0, x = 0, y = 0
        points.eachWithIndex { a, n ->
            def b = points[(n + 1) % points.size()]
            double cross = a.x * b.y - b.x * a.y
            area += cross / 2
            x += (a.x + b.x) * cross
            y += (a.y + b.y) * cross
        }
        [x / (6 * area), y / (6 * area)]
    }

    boolean contains(double x, double y) {
        if (!isArea()) return false
        def path = new Path2D.Double()
        points.eachWithIndex { p, n -> n ? path.lineTo(p.x, p.y) : path.moveTo(p.x, p.y) }
        path.closePath()
        path.contains(x, y)
    }
}
