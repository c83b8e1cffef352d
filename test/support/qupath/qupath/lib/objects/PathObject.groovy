// Stand-in for qupath.lib.objects.PathObject (QuPath 0.6): equality is identity, as there.
package qupath.lib.objects

import qupath.lib.measurements.MeasurementList
import qupath.lib.objects.classes.PathClass
import qupath.lib.roi.interfaces.ROI

class PathObject {
    UUID id = UUID.randomUUID()
    ROI roi
    PathClass pathClass
    String name
    boolean annotation
    final MeasurementList measurementList = new MeasurementList()
    final Map<String, String> metadata = [:]

    UUID getID() { id }
    ROI getROI() { roi }
    boolean hasROI() { roi != null }
    boolean isAnnotation() { annotation }
    boolean isDetection() { !annotation }
    MeasurementList getMeasurementList() { measurementList }
    Map<String, String> getMetadata() { metadata }
}
