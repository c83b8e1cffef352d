// Stand-in for qupath.lib.roi.ROIs (QuPath 0.6).
package qupath.lib.roi

import qupath.lib.geom.Point2
import qupath.lib.roi.interfaces.ROI

class ROIs {
    static ROI createPointsROI(List<? extends Point2> points, Object plane) {
        new ROI(type: points.size() == 1 ? "Point" : "MultiPoint", points: points, imagePlane: plane)
    }
}
