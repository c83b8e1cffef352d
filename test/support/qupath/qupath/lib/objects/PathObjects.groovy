// Stand-in for qupath.lib.objects.PathObjects (QuPath 0.6).
package qupath.lib.objects

import qupath.lib.objects.classes.PathClass
import qupath.lib.roi.interfaces.ROI

class PathObjects {
    static PathObject createAnnotationObject(ROI roi, PathClass pathClass) {
        new PathObject(roi: roi, pathClass: pathClass, annotation: true)
    }
}
